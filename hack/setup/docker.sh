# dockerd 20.10 with the containerd, runc and client that belong to it, and Debian's registry.
# shellcheck shell=bash

# docker_directory: prints the directory into which dockerd is unpacked.
docker_directory() {
    need_package libseccomp2 libdevmapper1.02.1
    need_command iptables=iptables
    unpacked docker bookworm:docker.io bookworm:containerd bookworm:runc bookworm:tini
}

# registry_directory: prints the directory into which docker-registry is unpacked.
registry_directory() { unpacked registry bookworm:docker-registry; }
