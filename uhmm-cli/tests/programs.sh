#!/bin/sh
# The programs of programs.rs at full size, each with a quarter of its peak: what it writes and how it
# ends must be what it is without uhmm. Usage, from the repository, after `cargo build --release`:
#
#     uhmm-cli/tests/programs.sh [DEVICE]
#
# UHMM is the command (target/release/uhmm). Programs that are missing are installed by apt-get, for root
# and unless UHMM_INSTALL_PROGRAMS=0. Those that are missing still are told of and left out, unless
# UHMM_REQUIRE_PROGRAMS=1. It takes some minutes and 1 GiB in a temporary folder.
set -u
device=${1:-lz4}
here=$(cd "$(dirname "$0")" && pwd)
uhmm=${UHMM:-$here/../../target/release/uhmm}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0

# install: installs what is missing, once. Only fetching has a deadline: it can be given up at any time.
tried=0
install() {
    [ "$tried" = 1 ] && return
    tried=1
    [ "${UHMM_INSTALL_PROGRAMS:-1}" != 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get > "$folder/where" || return
    set -- install --yes --no-install-recommends bsdutils coreutils gcc libc6-dev python3 redis-server stress-ng util-linux
    export DEBIAN_FRONTEND=noninteractive
    {
        timeout 60 apt-get "$@" --download-only || {
            timeout 60 apt-get update && timeout 60 apt-get "$@" --download-only
        }
    } > "$folder/apt" 2>&1 && apt-get "$@" --no-download >> "$folder/apt" 2>&1 && return
    echo "NOT INSTALLED: $(tail -n 1 "$folder/apt")"
}

# has PROGRAM: whether it is installed, if need be by us.
has() {
    command -v "$1" > "$folder/where" && return 0
    install
    command -v "$1" > "$folder/where" && return 0
    echo "SKIPPED: $1 is not installed"
    [ "${UHMM_REQUIRE_PROGRAMS:-0}" = 1 ] && failed=1
    return 1
}

# same NAME PROGRAM...: runs it twice, and compares.
same() {
    name=$1
    shift
    python3 -c '
import os, resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024))
sys.exit(status)' "$folder/peak" "$@" > "$folder/expected" 2> "$folder/expected.err"
    expected=$?
    budget=$(($(cat "$folder/peak") / 4))
    "$uhmm" run --budget "$budget" --device "$device" --json --report "$folder/report" -- "$@" \
        > "$folder/found" 2> "$folder/found.err"
    found=$?
    out=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["counts"]["pages_out"])' "$folder/report")
    if [ "$expected" = "$found" ] && cmp "$folder/expected" "$folder/found" \
        && cmp "$folder/expected.err" "$folder/found.err"; then
        echo "ok      $name: status $found, budget $budget bytes, $out pages went away"
    else
        echo "FAILED  $name: status $found instead of $expected"
        failed=1
    fi
}

has python3 || exit 2
python=$(python3 -c 'import sys; print(sys.executable)') || exit 2
"$python" -c '
import random, sys
random.seed(1)
for _ in range(2800000):
    print("%016x %s" % (random.getrandbits(64), "x" * random.randrange(100)))' > "$folder/lines"
"$python" -c '
print("int printf(const char *, ...);")
for i in range(1, 1500):
    print("int f%d(int a, int b) { int s = a; for (int i = 0; i < b; i++) { s += (i * %d) ^ (s >> %d);"
          " switch (s & 7) { case 1: s += 3; break; case 2: s ^= b; break; } } return s; }"
          % (i, i, i % 13 + 1))' > "$folder/source.c"

has sort && same "sort, 200 MB" sort -S 1G "$folder/lines"
same "python3, dictionaries" "$python" "$here/programs/dict.py" 1000000
same "sqlite3 in memory" "$python" "$here/programs/sqlite.py" 1000000
same "a daemon that forks" "$python" "$here/programs/daemon.py" 10000
has gcc && same "gcc" gcc -O2 -S "$folder/source.c" -o -
has stress-ng && same "stress-ng" stress-ng --vm 2 --vm-bytes 256M --vm-keep --vm-method flip --vm-ops 40000 --verify -q
if has redis-server; then
    mkdir "$folder/redis"
    FOLDER=$folder/redis KEYS=500000 "$here/programs/redis.sh" "$uhmm" run --budget 48M \
        --device "$device" --json --report "$folder/report" -- > "$folder/found"
    if grep -q "what was saved is what was there" "$folder/found" && grep -q "status 0" "$folder/found"; then
        echo "ok      redis-server with BGSAVE"
    else
        echo "FAILED  redis-server:"
        cat "$folder/found"
        failed=1
    fi
fi
exit "$failed"
