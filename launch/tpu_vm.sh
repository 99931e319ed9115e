#!/usr/bin/env bash
# @NAME@ on TPU VMs: create, install, run, logs, delete. `keep` does it all, again after a preemption or a failure. Once
# the run is finished, has met a mistake of the user or has used up its restarts, it deletes the machines.
set -euo pipefail

place=(--project=@PROJECT@ --zone=@ZONE@)

# UNKNOWN is no news: the cloud may be there while this machine does not reach it.
state() {
  local said errors
  errors=$(mktemp) || return 1
  if ! said=$(gcloud compute tpus queued-resources describe @NAME@ "${place[@]}" --format='value(state.state)' \
    2>"$errors"); then
    if grep -q NOT_FOUND "$errors"; then said=GONE; else said=UNKNOWN; fi
  fi
  rm "$errors"
  echo "$said"
}

everywhere() {
  gcloud compute tpus tpu-vm ssh @NAME@ "${place[@]}" --worker=all --command="$1"
}

create() {
  gcloud compute tpus queued-resources create @NAME@ --node-id=@NAME@ "${place[@]}" \
    --accelerator-type=@ACCELERATOR@ --runtime-version=@RUNTIME@ @SPOT@ || return 1
  local now
  until now=$(state) && [[ $now == ACTIVE ]]; do
    case $now in FAILED | SUSPENDED | SUSPENDING | GONE) echo "@NAME@: $now" >&2 && return 1 ;; esac
    sleep "${PAUSE:-30}"
  done
}

# What git knows or would add; neither its history nor what it ignores, such as run directories.
files() {
  local file
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    if [[ -e $file ]]; then printf '%s\0' "$file"; fi
  done
}

variables() {
  cat <<'VARIABLES'
@VARIABLES@
VARIABLES
  @SECRETS@
  printf 'export FEDJAX_PEFT_COMMIT=%q\n' "$(git describe --always --dirty 2>/dev/null)"
}

# Python of the images may be older than 3.11; uv brings one along.
install() {
  local folder status=0
  folder=$(mktemp -d) || return 1
  files | tar --null -T - -czf "$folder/@NAME@.tar.gz" && variables >"$folder/@NAME@.env" &&
    gcloud compute tpus tpu-vm scp "$folder/@NAME@.tar.gz" "$folder/@NAME@.env" @NAME@: \
      "${place[@]}" --worker=all &&
    everywhere "mkdir -p @FOLDER@ && tar -xzf @NAME@.tar.gz -C @FOLDER@ && cd @FOLDER@ &&
      export PATH=\"\$HOME/.local/bin:\$PATH\" &&
      { command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh; } &&
      uv venv --allow-existing --python 3.12 && "@INSTALL@ || status=1
  rm -r "$folder"
  return "$status"
}

# Left behind on the hosts, so that it outlives this connection. Addresses come from the TPU's metadata.
run() {
  everywhere "cd @FOLDER@ && if ! kill -0 \"\$(cat run.pid)\" 2>/dev/null; then
    . ../@NAME@.env && export PATH=\"\$PWD/.venv/bin:\$PATH\" && rm -f run.code
    setsid nohup bash -c "@RUN@" </dev/null >>run.log 2>&1 & echo \$! >run.pid
  fi"
}

# What the run has come to on the hosts, a word for all that agree: running, lost, or the code that it ended with.
ends() {
  everywhere "cd @FOLDER@ && if [[ -e run.code ]]; then echo \"end=\$(cat run.code)\"
    elif kill -0 \"\$(cat run.pid)\" 2>/dev/null; then echo end=running; else echo end=lost; fi" |
    grep -o 'end=[a-z0-9]*' | sort -u
}

# Until the run has ended: 0 if well on all hosts, 2 for a mistake, 1 for a failure, 3 if hosts do not answer any more.
await() {
  local end worst silent=0 found now
  while now=$(state) && [[ $now == ACTIVE || $now == UNKNOWN ]]; do
    if [[ $now == UNKNOWN ]]; then
      sleep "${PAUSE:-60}"
      continue
    fi
    found=$(ends) || found=
    worst=0
    silent=$((${#found} ? 0 : silent + 1))
    if ((silent == 10)); then return 3; fi
    if ((silent)); then worst=running; fi
    for end in $found; do
      case $end in
      end=2) return 2 ;;
      end=0) ;;
      end=running) if [[ $worst == 0 ]]; then worst=running; fi ;;
      *) worst=1 ;;
      esac
    done
    if [[ $worst != running ]]; then return "$worst"; fi
    sleep "${PAUSE:-60}"
  done
  return 3
}

# A process without its neighbours would wait for them.
stop() {
  everywhere "cd @FOLDER@ && kill -KILL -- -\"\$(cat run.pid)\" 2>/dev/null; rm -f run.pid" || true
}

logs() {
  gcloud compute tpus tpu-vm ssh @NAME@ "${place[@]}" --worker=0 --command="tail -n 100 ${1--f} @FOLDER@/run.log"
}

delete() {
  gcloud compute tpus queued-resources delete @NAME@ "${place[@]}" --force --quiet
}

left() {
  echo "@NAME@: the machines could not be deleted and are still rented: run '$0 delete'" >&2
}

finished() {
  gcloud storage ls @WORKDIR@/summary.json >/dev/null 2>&1
}

# Machines with this run on them: those that are there, or new ones.
begin() {
  local now
  while now=$(state) && [[ $now == UNKNOWN ]]; do sleep "${PAUSE:-60}"; done
  if [[ $now == ACTIVE ]] && run; then return; fi
  if [[ $now != GONE ]]; then delete; fi
  create && install && run
}

keep() {
  local start status
  variables >/dev/null # what is missing here should be said before anything is rented
  for ((start = 0; start <= @RESTARTS@; start++)); do
    if begin; then
      status=0
      await || status=$?
      case $status in
      0)
        delete
        return
        ;;
      1) stop ;;
      2)
        logs '' || true
        delete || left
        echo "@NAME@: a mistake in the job, which another start does not mend" >&2
        return 2
        ;;
      3) if finished; then delete && return; fi ;;
      esac
    fi
  done
  delete || left
  echo "@NAME@: not finished after @RESTARTS@ restarts" >&2
  return 1
}

case ${1:-} in
create | install | run | logs | delete | keep) "$1" ;;
*) echo "usage: $0 create|install|run|logs|delete|keep" >&2 && exit 2 ;;
esac
