# User-mode Linux, a kernel with unified cgroup v2 that runs as ordinary processes, and systemd to be process 1 on it.
# shellcheck shell=bash

# user_mode_linux_directory: prints the directory into which the kernel and its modules are unpacked.
user_mode_linux_directory() {
    need_command unshare=util-linux
    unpacked user-mode-linux bookworm:user-mode-linux
}

# whole_xstate_directory: prints the directory with whole_xstate.so, which User-mode Linux needs where a processor has
# more registers than it knows; see the source.
whole_xstate_directory() {
    local source=$checkout/hack/v2.d/whole_xstate.c
    need_package gcc libc6-dev
    cached "whole-xstate-$(key "$(<"$source")")" compile_library "$source" whole_xstate.so
}

compile_library() {
    local source=$1 name=$2 directory=$3
    gcc -shared -fPIC -O2 -Wall -Wextra -Werror -o "$directory/$name" "$source" -ldl
}

# systemd_directory: prints the directory into which systemd and the libraries that it is linked to are unpacked.
systemd_directory() {
    local packages=(
        systemd libsystemd-shared libacl1 libapparmor1 libaudit1 libblkid1 libcap-ng0 libcap2 libcrypt1 libgcrypt20
        libgpg-error0 libip4tc2 libkmod2 liblz4-1 liblzma5 libmount1 libpam0g libpcre2-8-0 libseccomp2 libselinux1 libssl3
        libzstd1
    )
    unpacked systemd "${packages[@]/#/bookworm:}"
}

# apparmor_directory: prints the directory into which the program that loads AppArmor's profiles is unpacked.
apparmor_directory() {
    need_package libstdc++6
    unpacked apparmor bookworm:apparmor
}
