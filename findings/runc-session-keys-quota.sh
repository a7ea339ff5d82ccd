#!/usr/bin/env bash
# A kernel counts keys by the user who made them and allows everybody but root 200 (kernel.keys.maxkeys, keyrings(7)).
# runc gives each container a session keyring of its own. One would not expect that to bound the number of containers:
# runc is root, who may have a million. But in a user namespace it is the namespace's root who makes it, an ordinary user
# of the host. So of containers whose user namespaces begin with the same uid, as rootless engines and whoever gives
# containers one range have them, about 200 can be there at a time. The next one fails with "disk quota exceeded", which
# sounds like a full disk. runc 1.1.5 of Debian 12 (libcontainer/standard_init_linux.go, JoinSessionKeyring; option
# --no-new-keyring, with which all containers have the keyring of whoever called runc).
#
# Needs a Debian 12 and root.
set -euo pipefail

directory=$(mktemp -d)
made=()

end() {
    trap - EXIT
    for id in "${made[@]}"; do
        "$runc" --root "$directory/state" delete --force "$id" || true
    done
    rm -rf "$directory"
}
trap end EXIT
cd "$directory"
chmod 0755 .

architecture=$(dpkg --print-architecture)
apt-get -qq -o APT::Sandbox::User=root download \
    "runc:$architecture=1.1.5+ds1-1+deb12u1" "libseccomp2:$architecture" "busybox-static:$architecture"
for package in ./*.deb; do
    dpkg-deb --extract "$package" packages
done
LD_LIBRARY_PATH=$(echo packages/usr/lib/*-linux-gnu | sed "s,^,$directory/,")
export LD_LIBRARY_PATH
runc=$directory/packages/usr/sbin/runc

mkdir -p bundle/rootfs/bin bundle/rootfs/proc
cp packages/bin/busybox bundle/rootfs/bin/busybox
chown -R 1900000000:1900000000 bundle/rootfs
cat >bundle/config.json <<'CONFIG'
{
  "ociVersion": "1.0.2",
  "process": {
    "terminal": false,
    "user": {"uid": 0, "gid": 0},
    "args": ["/bin/busybox", "true"],
    "cwd": "/",
    "noNewPrivileges": true
  },
  "root": {"path": "rootfs", "readonly": true},
  "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
  "linux": {
    "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "network"}, {"type": "user"}],
    "uidMappings": [{"containerID": 0, "hostID": 1900000000, "size": 65536}],
    "gidMappings": [{"containerID": 0, "hostID": 1900000000, "size": 65536}]
  }
}
CONFIG

"$runc" --version | head -n 1
allowed=$(</proc/sys/kernel/keys/maxkeys)
echo "Keys that an ordinary user may have: $allowed"
failed=
for ((number = 0; number <= allowed; number++)); do
    id=finding-$$-$number
    if ! "$runc" --root "$directory/state" create --bundle bundle "$id" >output 2>&1 </dev/null; then
        cat output
        failed=$(grep -o "disk quota exceeded" output | head -n 1 || true)
        break
    fi
    made+=("$id")
done
echo "Containers at a time: ${#made[@]}"
echo "The next one: ${failed:-is made, too}"

if [[ $failed == "disk quota exceeded" ]] && ((${#made[@]} <= allowed)); then
    echo "As described: the quota of keys bounds the containers of one range of uids."
else
    echo "This has changed: expected a failure with 'disk quota exceeded' at about $allowed containers." >&2
    exit 1
fi
