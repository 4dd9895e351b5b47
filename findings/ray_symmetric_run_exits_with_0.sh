#!/usr/bin/env bash
# Ray: `ray symmetric-run` exits with 0 where Ray could not start and the command never ran.
#
# Seen 2026-11-29 with ray 2.60.0 on Python 3.11: an object store that does not fit the machine (`ray start` refuses it, with
#   exit code 1), in namespaces of its own, since symmetric-run stops every Ray of the user at its end.
# Seen: symmetric-run prints "Failed to start Ray" and exits with 0; the command was not run. With a Ray that starts, a
#   command's own failure is handed on: `false` gives 1.
# One would have guessed: a launcher that did not run its command fails, as `srun`, `mpirun` and `ray start` itself do.
# Why it matters: it is Ray's way to run a command on the nodes of a Slurm job. On one smaller node of many, or after an
#   upgrade that refuses an option, the job is COMPLETED with exit code 0, whatever follows with `afterok` starts on output
#   that is not there or not whole, and no alert on failed jobs is raised. Let the command leave a mark at its end, and hold
#   the job against the mark.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ray==2.60.0
cd "$work"
export HOME="$work" RAY_TMPDIR="$work/ray" RAY_USAGE_STATS_ENABLED=0 PATH="$work/venv/bin:$PATH"
mkdir ray

symmetric_run() { # OBJECT_STORE_BYTES COMMAND...: its exit code; the log goes to $work/log
    unshare --user --map-root-user --pid --mount --mount-proc --fork --kill-child \
        ray symmetric-run --address 127.0.0.1:6399 --num-cpus 1 --object-store-memory "$1" -- "${@:2}" >log 2>&1 && echo 0 || echo $?
}

memory_bytes=$(($(awk '$1 == "MemTotal:" { print $2 }' /proc/meminfo) * 1024))
failing=$(symmetric_run 100000000 false)
grep --quiet "Command failed" log || { cat log; exit 1; } # namespaces or Ray do not work here
too_large=$(symmetric_run $((10 * memory_bytes)) touch ran)
grep "Failed to start Ray" log || { cat log; exit 1; }

echo "exit code of a failing command: $failing"
echo "exit code where Ray did not start: $too_large; the command ran: $([[ -e ran ]] && echo yes || echo no)"
[[ $failing == 1 && $too_large == 0 && ! -e ran ]] || { echo "The behaviour has changed."; exit 1; }
