# Everything of this directory, for the programs of hack/: `. hack/setup/all.sh`.
# shellcheck shell=bash
set -euo pipefail
# An error inside $(…) is an error too.
shopt -s inherit_errexit

checkout=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)

# shellcheck source=cache.sh
. "$checkout/hack/setup/cache.sh"
# shellcheck source=packages.sh
. "$checkout/hack/setup/packages.sh"
# shellcheck source=containerd.sh
. "$checkout/hack/setup/containerd.sh"
# shellcheck source=docker.sh
. "$checkout/hack/setup/docker.sh"
# shellcheck source=user_mode_linux.sh
. "$checkout/hack/setup/user_mode_linux.sh"
# shellcheck source=virtualenv.sh
. "$checkout/hack/setup/virtualenv.sh"
# shellcheck source=bench.sh
. "$checkout/hack/setup/bench.sh"
