#!/usr/bin/env bash
# The rendered SLURM script on a real SLURM: two tasks on this machine, one of them killed in the middle, queued again.
#
#   apt-get install slurm-wlm munge
#   tests/slurm_by_hand.sh [FLAG ..]       as root, where no other SLURM runs; prints the transcript
#
# It trains the quickstart's config with the flags of `fedjax-peft run` that are given, two processes with a virtual
# device each. A task is killed once the workdir has a file whose path ends in KILL_AT (checkpoints/1).
set -euo pipefail
cd "$(dirname "$0")/.."

place=$(mktemp -d)
export SLURM_CONF=$place/slurm.conf
daemons=()
leave() {
  scancel --user="$(id -un)" 2>/dev/null || true
  if ((${#daemons[@]})); then kill "${daemons[@]}" 2>/dev/null || true; fi
}
trap leave EXIT

mkdir -p "$place"/{state,spool,logs} /run/munge
dd if=/dev/urandom of="$place/munge.key" bs=1 count=1024 status=none
chmod 400 "$place/munge.key"
munged --force --foreground --key-file="$place/munge.key" --socket=/run/munge/munge.socket.2 \
  --log-file="$place/munged.log" --pid-file="$place/munged.pid" --seed-file="$place/munged.seed" >/dev/null 2>&1 &
daemons+=("$!")

host=$(hostname -s)
cat >"$SLURM_CONF" <<EOF
ClusterName=byhand
SlurmctldHost=$host(localhost)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge/munge.socket.2
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MinJobAge=3600
KillWait=120
NodeName=$host NodeAddr=localhost CPUs=$(nproc) RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
sleep 1
slurmctld -D >/dev/null 2>&1 &
daemons+=("$!")
slurmd -D -N "$host" >/dev/null 2>&1 &
daemons+=("$!")
until sinfo --noheader --format=%T 2>/dev/null | grep -q idle; do sleep 1; done

job=$place/job.toml
flags=
for flag in "$@"; do flags+="\"$flag\", "; done
sed -e 's|^name = .*|name = "byhand"|' -e 's|^config = .*|config = "configs/quickstart.py"|' \
  -e "s|^flags = .*|flags = [${flags%, }]|" -e "s|^workdir = .*|workdir = \"$place/run\"|" \
  -e 's|^kind = .*|kind = "cpu"|' -e 's|^hosts = .*|hosts = 1|' -e 's|^tasks = .*|tasks = 2|' \
  -e 's|^cpus = .*|cpus = 1|' -e 's|^memory = .*|memory = "1500M"|' -e "s|^logs = .*|logs = \"$place/logs\"|" \
  -e 's|^options = .*|options = []|' -e 's|^environment = .*|environment = "export JAX_PLATFORMS=cpu"|' \
  launch/jobs/slurm.toml >"$job"
number=$(python3 launch/render.py slurm "$job" submit | grep -o '[0-9]*$')
echo "submitted as job $number"

state() { scontrol show job "$number" | grep -o "$1=[^ ]*" | cut -d= -f2; }
until [[ $(state JobState) == RUNNING ]]; do sleep 1; done
reached() { [[ -n $(find "$place/run" -path "*/${KILL_AT:-checkpoints/1}" 2>/dev/null) ]]; }
until reached || [[ $(state JobState) != RUNNING ]]; do sleep 1; done
victim=$(scontrol listpids "$number" | awk '$4 == 1 {print $1; exit}')
echo "killing task 1, process $victim"
kill -KILL "$victim"
until [[ $(state JobState) =~ COMPLETED|FAILED|CANCELLED|TIMEOUT ]]; do
  if [[ $(state JobState) == PENDING ]]; then
    # Left alone it would wait for two minutes; at once SLURM takes the new start for the one that it has just ended.
    sleep 10
    scontrol update JobId="$number" StartTime=now 2>/dev/null || true
  fi
  sleep 2
done
echo "--- log of the job"
cat "$place"/logs/*.log
echo "--- end: $(state JobState), exit code $(state ExitCode), restarts $(state Restarts), files in $place"
[[ $(state JobState) == COMPLETED && $(state Restarts) -ge 1 ]]
