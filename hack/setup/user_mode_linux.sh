# User-mode Linux: a kernel with unified cgroup v2 that runs as ordinary processes.
# shellcheck shell=bash

# user_mode_linux_directory: prints the directory into which the kernel and its modules are unpacked.
user_mode_linux_directory() {
    need_command unshare=util-linux
    unpacked user-mode-linux bookworm:user-mode-linux
}
