#!/usr/bin/env bash
# Make this machine a SLURM cluster of one node (Debian's slurm-wlm with accounting) and run the tests' tiny recipe on it:
# the same output digests as in one process, also with a job requeued, a job killed, and the driver killed.
# As root on Debian, for a machine that may be thrown away. PYTHON names the interpreter that has salsa installed.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
home=${1:-/tmp/slurm-here}

if ! command -v slurmdbd >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm slurmdbd mariadb-server munge >/dev/null
fi
mkdir -p "$home"/{etc,ctld,d,log}
chmod 755 "$home"
export SLURM_CONF=$home/etc/slurm.conf
host=$(hostname -s)
cat >"$home/etc/slurmdbd.conf" <<EOF
AuthType=auth/munge
DbdHost=localhost
SlurmUser=root
LogFile=$home/log/slurmdbd.log
PidFile=$home/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
EOF
chmod 600 "$home/etc/slurmdbd.conf"
cat >"$SLURM_CONF" <<EOF
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
KillWait=1
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
StateSaveLocation=$home/ctld
SlurmdSpoolDir=$home/d
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd.log
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(free -m | awk '/^Mem/ {print int($2 * 0.8)}') State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=1:00:00 State=UP
EOF

if ! scontrol ping 2>/dev/null | grep -q "is UP"; then
  install -d -o munge -g munge /run/munge
  pgrep -x munged >/dev/null || setsid runuser -u munge -- /usr/sbin/munged
  pgrep -x mariadbd >/dev/null || { setsid service mariadb start >/dev/null 2>&1 || true; }
  for _ in $(seq 60); do mariadb -e 'select 1' >/dev/null 2>&1 && break; sleep 1; done
  # numbers of jobs begin at 1 again: sacct would find those of an earlier cluster
  [ -e "$home/ctld/job_state" ] || mariadb -e "drop database if exists slurm_acct_db"
  mariadb -e "create database if not exists slurm_acct_db; create user if not exists slurm@localhost identified by 'slurm'; grant all on slurm_acct_db.* to slurm@localhost;"
  setsid slurmdbd
  for _ in $(seq 60); do sacctmgr -n list cluster >/dev/null 2>&1 && break; sleep 1; done
  sacctmgr -i add cluster here >/dev/null 2>&1 || true
  setsid slurmctld
  sleep 3
  setsid slurmd
  for _ in $(seq 60); do sinfo -h -o %t | grep -qE 'idle|mix|alloc' && break; sleep 1; done
fi
sinfo

PYTHONPATH="$here/src:$here${PYTHONPATH:+:$PYTHONPATH}" "$python" "$here/scripts/slurm_faults.py" "$home/work"
