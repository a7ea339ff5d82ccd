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
