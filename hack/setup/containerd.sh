# containerd with its shim and ctr, runc and crun: three releases, as three Debian suites have them.
# shellcheck shell=bash

# containerd_directory 1.6|1.7|2.1: prints the directory into which that release is unpacked.
containerd_directory() {
    local suite
    case $1 in
    1.6) suite=bookworm ;;
    1.7) suite=trixie ;;
    2.1) suite=forky ;;
    *) fail "no containerd $1 here; there are 1.6, 1.7 and 2.1" ;;
    esac
    need_package libseccomp2 libyajl2
    unpacked "containerd-$1" "$suite:containerd" bookworm:runc bookworm:crun
}

# newer_runc: prints the path of a runc 1.3, which can map the ids of mounts. Forky's is linked with a newer C library than
# bookworm's, so it brings its own.
newer_runc() {
    need_package libstdc++6
    printf '%s/usr/sbin/runc\n' "$(cached "runc-1.3-$(key "$(declare -f make_newer_runc)")" make_newer_runc)"
}

make_newer_runc() {
    # Where it will be, once it is complete.
    local libraries=${1%.making}/usr/lib/x86_64-linux-gnu
    unpack forky:runc forky:libc6 forky:libseccomp2 bookworm:patchelf "$1"
    "$1/usr/bin/patchelf" --set-interpreter "$libraries/ld-linux-x86-64.so.2" --set-rpath "$libraries" "$1/usr/sbin/runc"
}
