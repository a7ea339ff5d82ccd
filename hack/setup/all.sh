# Everything of this directory: `source hack/setup/all.sh` in a program of hack/.
# shellcheck shell=bash
set -euo pipefail
shopt -s inherit_errexit

checkout=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)

# shellcheck source-path=SCRIPTDIR
for part in cache packages containerd docker virtualenv; do
    # shellcheck source=/dev/null
    [[ ! -e $checkout/hack/setup/$part.sh ]] || . "$checkout/hack/setup/$part.sh"
done
unset part
