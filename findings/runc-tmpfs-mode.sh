#!/usr/bin/env bash
# A tmpfs that config.json mounts with the option mode=1777 should have that mode. runc 1.1.5, that of Debian 12,
# gives it the mode of the directory below whenever the image has one, so that a scratch space can be closed to the
# container's user; where runc had to make the directory, the option holds. A chmod after the mount does it, in
# libcontainer/rootfs_linux.go, mountToRootfs; mended later (opencontainers/runc issue 3911, pull requests 3912 and
# 3916).
#
# Needs a Debian 12 and root.
set -euo pipefail

directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cd "$directory"

architecture=$(dpkg --print-architecture)
apt-get -qq -o APT::Sandbox::User=root download \
    "runc:$architecture=1.1.5+ds1-1+deb12u1" "libseccomp2:$architecture" "busybox-static:$architecture"
for package in ./*.deb; do
    dpkg-deb --extract "$package" packages
done
LD_LIBRARY_PATH=$(echo packages/usr/lib/*-linux-gnu | sed "s,^,$directory/,")
export LD_LIBRARY_PATH

mkdir -p bundle/rootfs/bin bundle/rootfs/in-image bundle/rootfs/proc
chmod 0755 bundle/rootfs/in-image
cp packages/bin/busybox bundle/rootfs/bin/busybox
cat >bundle/config.json <<'CONFIG'
{
  "ociVersion": "1.0.2",
  "process": {
    "terminal": false,
    "user": {"uid": 0, "gid": 0},
    "args": ["/bin/busybox", "stat", "-c", "%n %a", "/in-image", "/not-in-image"],
    "cwd": "/",
    "noNewPrivileges": true
  },
  "root": {"path": "rootfs"},
  "mounts": [
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {"destination": "/in-image", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]},
    {"destination": "/not-in-image", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}
  ],
  "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "network"}]}
}
CONFIG

runc=packages/usr/sbin/runc
"$runc" --version | head -n 1
seen=$("$runc" --root "$directory/state" run --bundle bundle "finding-$$")
printf '%s\n' "$seen"

if [[ $seen == $'/in-image 755\n/not-in-image 1777' ]]; then
    echo "As described: of two mounts with mode=1777, one has the mode of the image's directory."
else
    echo "This has changed: expected 755 and 1777." >&2
    exit 1
fi
