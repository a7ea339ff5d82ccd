#!/usr/bin/env bash
# A dockerd that is killed while it creates a container has told nobody that container's id, and at its next start one
# would expect it to tidy up what it was making. dockerd 20.10.24 (Debian 12) leaves a mount: the layer below the
# container's own, in which it makes a few empty files first, stays mounted at overlay2/NAME-init/merged. No container
# has it, neither a restart nor `docker system prune` takes it away, and umount(8) or a restart of the host does. Each
# such kill may leave one (initMount in layer/layer_store.go mounts and unmounts, and nothing looks for it later).
#
# Needs a Debian 12, root, and a file system for overlays at the temporary directory.
set -euo pipefail

directory=$(mktemp -d)
daemon=

end() {
    trap - EXIT
    [[ -z $daemon ]] || { kill -TERM "$daemon" && wait "$daemon"; } || true
    grep -o " $directory[^ ]*" /proc/self/mountinfo | sort -r | xargs -r -n 1 umount --lazy 2>/dev/null || true
    rm -rf "$directory"
}
trap end EXIT
cd "$directory"

architecture=$(dpkg --print-architecture)
apt-get -qq -o APT::Sandbox::User=root download \
    "docker.io:$architecture=20.10.24+dfsg1-1+deb12u1+b6" "containerd:$architecture=1.6.20~ds1-1+deb12u3" \
    "runc:$architecture=1.1.5+ds1-1+deb12u1" "libseccomp2:$architecture" "libdevmapper1.02.1:$architecture" \
    "busybox-static:$architecture"
for package in ./*.deb; do
    dpkg-deb --extract "$package" packages
done
PATH=$directory/packages/usr/sbin:$directory/packages/usr/bin:$PATH
libraries=$(printf '%s:' packages/lib/*-linux-gnu packages/usr/lib/*-linux-gnu | sed "s,packages,$directory/packages,g")
export LD_LIBRARY_PATH=$libraries DOCKER_HOST=unix://$directory/docker.sock DOCKER_CONFIG=$directory
dockerd --version

start() {
    # Otherwise a process that nobody has waited for yet would look alive to it.
    rm -f docker.pid exec/containerd/containerd.pid
    dockerd --host "$DOCKER_HOST" --data-root "$directory/root" --exec-root "$directory/exec" \
        --pidfile "$directory/docker.pid" --bridge none --iptables=false --ip-masq=false --storage-driver overlay2 \
        >>dockerd.log 2>&1 &
    daemon=$!
    for _ in {1..300}; do
        docker version >/dev/null 2>&1 && return
        sleep 0.1
    done
    tail dockerd.log >&2
    exit 1
}

left() {
    grep -c " $directory/root/overlay2/[^ ]*-init/merged " /proc/self/mountinfo || true
}

start
tar --create --directory packages bin/busybox | docker import - busybox >/dev/null

for kills in {1..150}; do
    for _ in {1..8}; do
        docker create busybox /bin/busybox true >/dev/null 2>&1 &
    done
    sleep "0.0$((RANDOM % 90 + 10))"
    kill -KILL "$daemon"
    # Its containerd would go on.
    [[ ! -s exec/containerd/containerd.pid ]] || kill -KILL "$(<exec/containerd/containerd.pid)" 2>/dev/null || true
    wait 2>/dev/null || true
    start
    [[ $(left) == 0 ]] || break
done

echo "Kills until a mount was left: $kills"
docker container prune --force >/dev/null
docker system prune --force >/dev/null
echo "Containers after a prune: $(docker ps --all --quiet | wc -l)"
echo "Layers still mounted:     $(left)"

if [[ $(docker ps --all --quiet | wc -l) == 0 && $(left) -gt 0 ]]; then
    echo "As described: no container is left, and a layer of one stays mounted."
else
    echo "This has changed, or the kills came at no such moment: expected a layer that stays mounted." >&2
    exit 1
fi
