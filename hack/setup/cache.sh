# What is made once and kept: `cached` makes a directory under a lock and a temporary name, and renames it when complete,
# so that neither an interrupted run nor two runs at once leave something half made.
# shellcheck shell=bash

cache_directory=${AIRFLOW_ISOLATION_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/airflow-isolation}

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "$@"
    exit 1
}

# key STRING…: twelve hexadecimal digits that stand for these strings.
key() { printf '%s\n' "$@" | sha256sum | cut -c 1-12; }

# under_lock NAME COMMAND…: runs COMMAND while no other process holds NAME.
under_lock() {
    local name=$1
    shift
    mkdir -p "$cache_directory/locks"
    (
        exec 9>"$cache_directory/locks/$name"
        flock 9
        "$@" 9>&-
    )
}

# cached NAME COMMAND…: prints the directory NAME of the cache; where it is not there, `COMMAND… DIRECTORY` fills it first.
cached() {
    local name=$1
    shift
    [[ -d $cache_directory/$name ]] || under_lock "$name" fill_cache "$name" "$@" >&2
    printf '%s\n' "$cache_directory/$name"
}

fill_cache() {
    local name=$1 making=$cache_directory/$1.making
    shift
    [[ ! -d $cache_directory/$name ]] || return 0
    rm -rf "$making"
    mkdir -p "$making"
    "$@" "$making"
    mv "$making" "$cache_directory/$name"
}
