#!/usr/bin/env bash
# Runs the kernel's own HMM selftest, tools/testing/selftests/mm/hmm-tests, as it stands against the
# mirror device of `uhmm dmirror`.
#
# The source comes from Debian's package linux-source-VERSION, or from a kernel tree that is given, and
# is built in a folder of its own: nothing of it gets into this repository. Huge pages are reserved and
# transparent ones are set to `madvise` for the time of the tests; both are put back whatever happens,
# so this needs root.
#
# The output is that of the tests, and one line of summary. The exit status is 0 if every test of every
# run has passed. A test that was skipped has not passed, nor has one that had nothing to test: `compound`
# and `anon_write_hugetlbfs` where there are no huge pages.
set -euo pipefail

usage() {
    cat <<'USAGE'
Usage: tests/kernel-selftests.sh [OPTION]...
  --source FOLDER   a kernel tree, instead of the package's
  --version VERSION of the package linux-source-VERSION (6.12)
  --suite SUITE     of Debian that has it (trixie)
  --times N         how many runs (1)
  --thp MODE        transparent huge pages: madvise, always or never (madvise)
  --only NAME       only tests of this name (hmm-tests -t); may be given more than once
  --uhmm COMMAND    the command, instead of building it
  --work FOLDER     where the package is kept and built (a folder of the user's cache)
USAGE
}

die() {
    echo "kernel-selftests.sh: $*" >&2
    exit 2
}

# All of it is read before any of it runs: this file may change meanwhile.
main() {
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    source='' version=6.12 suite=trixie times=1 thp=madvise uhmm='' work='' only=()
    while (($# > 0)); do
        case $1 in
            -h | --help)
                usage
                exit 0
                ;;
            --source | --version | --suite | --times | --thp | --only | --uhmm | --work)
                (($# > 1)) || die "$1 needs a value; see --help"
                case $1 in
                    --source) source=$(cd "$2" && pwd) ;;
                    --version) version=$2 ;;
                    --suite) suite=$2 ;;
                    --times) times=$2 ;;
                    --thp) thp=$2 ;;
                    --only) only+=(-t "$2") ;;
                    --uhmm) uhmm=$2 ;;
                    --work) work=$2 ;;
                esac
                shift 2
                ;;
            *) die "$1: no such option; see --help" ;;
        esac
    done
    [[ $times =~ ^[1-9][0-9]*$ ]] || die "--times $times: give a number"
    [[ $thp =~ ^(madvise|always|never)$ ]] || die "--thp $thp: madvise, always or never"
    ((EUID == 0)) || die "huge pages can be reserved by root alone: run it with sudo"
    work=${work:-${XDG_CACHE_HOME:-$HOME/.cache}/uhmm-kernel-selftests}
    mkdir -p "$work"
    work=$(cd "$work" && pwd)

    # Gets the package into $work, with lists of its own: the system's are not touched.
    fetch() {
        local keyring=/usr/share/keyrings/debian-archive-keyring.gpg apt=$work/apt
        [[ -e $keyring ]] || die "$keyring is missing: install debian-archive-keyring, or give --source"
        mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
        echo "deb [signed-by=$keyring] http://deb.debian.org/debian $suite main" >"$apt/sources.list"
        local options=(
            -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
            -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root
        )
        apt-get -qq "${options[@]}" update >&2
        (cd "$work" && apt-get -qq "${options[@]}" download "linux-source-$version" >&2) ||
            die "there is no linux-source-$version in $suite: name another --version, --suite or --source"
    }

    # Unpacks of the package what the test is built from.
    unpack() {
        local tree=$work/linux-source-$version package
        if [[ ! -e $tree/.unpacked ]]; then
            package=$(find "$work" -maxdepth 1 -name "linux-source-${version}_*.deb" | sort | tail -n 1)
            if [[ -z $package ]]; then
                fetch
                package=$(find "$work" -maxdepth 1 -name "linux-source-${version}_*.deb" | sort | tail -n 1)
            fi
            echo "# unpacking ${package##*/}" >&2
            rm -rf "$tree"
            dpkg-deb --fsys-tarfile "$package" |
                tar -xO "./usr/src/linux-source-$version.tar.xz" |
                tar -xJ -C "$work" --wildcards \
                    "linux-source-$version/tools" "linux-source-$version/scripts" \
                    "linux-source-$version/lib/test_hmm_uapi.h" "linux-source-$version/mm/gup_test.h" \
                    "linux-source-$version/include/uapi" "linux-source-$version/arch/*/include/uapi" \
                    "linux-source-$version/Makefile"
            touch "$tree/.unpacked"
        fi
        source=$tree
    }

    [[ -n $source ]] || unpack
    [[ -e $source/tools/testing/selftests/mm/hmm-tests.c ]] || die "$source: no hmm-tests.c in there"
    built=$work/built-$(basename "$source")
    mkdir -p "$built"
    make -s -C "$source/tools/testing/selftests/mm" "OUTPUT=$built" "$built/hmm-tests" >&2 ||
        die "hmm-tests was not built: are make and a C compiler installed?"
    if [[ -z $uhmm ]]; then
        (cd "$root" && cargo build --release --package uhmm-cli >&2)
        uhmm=${CARGO_TARGET_DIR:-$root/target}/release/uhmm
    fi

    # What is changed for the tests, and put back.
    pages=/proc/sys/vm/nr_hugepages modes=/sys/kernel/mm/transparent_hugepage/enabled
    pages_before=$(<"$pages")
    mode_before=$(sed 's/.*\[\(.*\)\].*/\1/' "$modes")
    output=$(mktemp)
    restore() {
        echo "$pages_before" >"$pages" || true
        echo "$mode_before" >"$modes" || true
        rm -f "$output"
    }
    trap restore EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    echo "$thp" >"$modes"
    ((pages_before >= 16)) || echo 16 >"$pages"

    free_pages() {
        sed -n 's/^HugePages_Free: *//p' /proc/meminfo
    }

    passed=0 failed=0 skipped=0 vacuous=0 missing=0 expected=0
    for ((run = 1; run <= times; run++)); do
        ((times == 1)) || echo "# run $run of $times"
        # One is used at a time, and three are asked for in the kernel's own description of the tests.
        (($(free_pages) >= 3)) || vacuous=$((vacuous + 1))
        # Each test has half a minute by itself; a hang is in the kernel, where only SIGKILL helps.
        status=0
        timeout -s KILL 900 "$uhmm" dmirror -- "$built/hmm-tests" "${only[@]}" >"$output" 2>&1 ||
            status=$?
        cat "$output"
        plan=$(sed -n 's/^1\.\.\([0-9]*\)$/\1/p' "$output" | head -n 1)
        ok=$(grep -c '^ok ' "$output" || true)
        skips=$(grep -c '^ok .*# SKIP' "$output" || true)
        bad=$(grep -c '^not ok ' "$output" || true)
        passed=$((passed + ok - skips)) skipped=$((skipped + skips)) failed=$((failed + bad))
        expected=$((expected + ${plan:-0}))
        if [[ -z $plan ]] || ((ok + bad != plan)) || { ((status != 0)) && ((bad == 0)); }; then
            missing=$((missing + 1))
        fi
    done

    line="uhmm: hmm-tests of ${source##*/}, THP $thp: $passed of $expected passed, $failed failed, $skipped skipped"
    ((vacuous == 0)) || line+=", $vacuous of $times runs without huge pages"
    ((missing == 0)) || line+=", $missing of $times runs did not come to their end"
    echo "$line"
    ((passed == expected && expected > 0 && vacuous == 0 && missing == 0))
}

main "$@"
