#!/bin/sh
# A real Slurm of one node on this machine, for the tests, and for trying things out by hand.
#
#   sh start_slurm.sh start DIR   # then: export SLURM_CONF=DIR/slurm.conf
#   sh start_slurm.sh stop DIR    # ends the daemons and the jobs; DIR stays
#
# All its state (configuration, key, sockets, logs, process ids) is in DIR. Both may be repeated. No
# root, systemd, cgroups or accounting is needed. A Slurm that this machine belongs to is left alone:
# where /etc/slurm/slurm.conf exists, nothing is started.
#
# Needs: apt-get install slurm-wlm munge
# Partitions: "low" (the default), whose jobs are requeued when "high" wants the processors, and
# "grace", likewise with a warning 20 seconds ahead.
set -eu
PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "error: $*" >&2
    exit 2
}

usage="usage: sh start_slurm.sh start|stop DIR"
[ $# -eq 2 ] || fail "$usage"
mkdir -p "$2"
dir=$(cd "$2" && pwd)
socket=$dir/munge.socket

running() { # NAME: whether the daemon with the process id in DIR/NAME.pid is there
    [ -s "$dir/$1.pid" ] && pid=$(cat "$dir/$1.pid") || return 1
    # A number may have been given to another process since.
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ]
}

wait_for() { # SECONDS COMMAND...
    left=$(($1 * 10))
    shift
    until "$@" >/dev/null 2>&1; do
        left=$((left - 1))
        [ $left -gt 0 ] || return 1
        sleep 0.1
    done
}

gone() { ! running "$1"; }

idle() { [ "$(sinfo -h -p low -o %T)" = idle ]; }

stop() {
    if running slurmctld; then
        SLURM_CONF=$dir/slurm.conf scancel --signal=KILL --full --state=RUNNING 2>/dev/null || true
        SLURM_CONF=$dir/slurm.conf scancel --user="$(id -un)" 2>/dev/null || true
    fi
    for name in slurmctld slurmd munged; do
        running $name && kill "$(cat "$dir/$name.pid")"
        wait_for 10 gone $name || kill -9 "$(cat "$dir/$name.pid")"
    done
    rm -f "$socket"
}

configure() {
    [ ${#socket} -lt 100 ] || fail "$dir: too long a path for a socket; give a shorter one"
    case $dir in *[!A-Za-z0-9/._-]*) fail "$dir: Slurm reads paths of plain characters only" ;; esac
    mkdir -p "$dir/state" "$dir/spool"
    chmod 700 "$dir"
    # shellcheck disable=SC2046
    set -- $(python3 -c "
import socket
sockets = [socket.socket() for _ in range(2)]
for one in sockets:
    one.bind(('127.0.0.1', 0))
print(*(one.getsockname()[1] for one in sockets))")
    host=$(hostname -s)
    cat >"$dir/slurm.conf" <<CONF
# A job that is requeued waits for cred_expire seconds: 5 is the least, 120 the default.
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$1
SlurmdPort=$2
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=10
MinJobAge=300
NodeName=node NodeHostname=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=node Default=YES PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace Nodes=node PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=node PriorityTier=10 PreemptMode=OFF
CONF
}

start() {
    for name in slurmctld slurmd munged sinfo; do
        command -v $name >/dev/null || fail "$name is missing: apt-get install slurm-wlm munge"
    done
    [ ! -e /etc/slurm/slurm.conf ] ||
        fail "this machine has a Slurm of its own (/etc/slurm/slurm.conf): nothing was started"
    SLURM_CONF=$dir/slurm.conf
    export SLURM_CONF
    if running munged && running slurmctld && running slurmd; then
        return
    fi
    stop
    configure
    trap stop EXIT # what has begun, where something fails
    [ -s "$dir/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    munged --force --socket="$socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" --num-threads=2 \
        2>>"$dir/munged.err" || fail "munged did not start: see $dir/munged.err"
    wait_for 5 test -S "$socket" || fail "munged did not start: see $dir/munged.log"
    slurmctld -c 2>>"$dir/slurmctld.err" || fail "slurmctld did not start: see $dir/slurmctld.err"
    slurmd -N node 2>>"$dir/slurmd.err" || fail "slurmd did not start: see $dir/slurmd.err"
    wait_for 20 idle || fail "the node did not come up: see $dir/slurmctld.log, $dir/slurmd.log"
    trap - EXIT
}

case $1 in
start) start ;;
stop) stop ;;
*) fail "$usage" ;;
esac
