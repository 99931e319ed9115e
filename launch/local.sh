#!/usr/bin/env bash
# @NAME@: @PROCESSES@ processes on this machine; if one ends badly all are started again from the last checkpoint.
set -euo pipefail
@NEEDED@
@VARIABLES@

pids=()
asked=0

stop() {
  asked=1
  if ((${#pids[@]})); then kill -TERM "${pids[@]}" 2>/dev/null || true; fi
}
trap stop TERM INT

start() {
  pids=()
  local process
  for ((process = 0; process < @PROCESSES@; process++)); do
    (
      @DEVICES@
      exec @RUN@ --coordinator=localhost:@PORT@ --processes=@PROCESSES@ --process="$process"
    ) &
    pids+=("$!")
  done
}

# The first bad end, or 0 if all end well. A process without its neighbours would wait for them.
ended() {
  local worst=0 status pid
  for _ in "${pids[@]}"; do
    status=0
    wait -n || status=$?
    if ((status && !worst)); then
      worst=$status
      for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    fi
  done
  wait
  return "$worst"
}

for ((attempt = 0; ; attempt++)); do
  start
  status=0
  ended || status=$?
  # 2 is a mistake of the user, which another start does not mend.
  if ((status == 0 || status == 2 || asked || attempt >= @RESTARTS@)); then exit "$status"; fi
  echo "@NAME@: ended with code $status, start $((attempt + 2))" >&2
done
