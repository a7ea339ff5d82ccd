# Debian packages: plain tools are installed when missing; daemons are only downloaded and unpacked, because installing
# them would start services. Other suites are read through a private apt configuration on the machine's own mirror.
# shellcheck shell=bash disable=SC2154  # checkout is set in all.sh, cache_directory in cache.sh

# need_command COMMAND=PACKAGE…: installs the packages whose command is missing.
need_command() {
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
    done
    install_packages "${missing[@]}"
}

# need_package PACKAGE…: installs the packages that are not installed.
need_package() {
    local package missing=()
    for package in "$@"; do
        dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
            missing+=("$package")
    done
    install_packages "${missing[@]}"
}

install_packages() {
    (($#)) || return 0
    ((EUID == 0)) || fail "These packages are missing and only root can install them: $*"
    say "apt: installing $*"
    under_lock apt apt_install "$@" >&2
}

apt_install() {
    local -x DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1
    local package
    for package in "$@"; do
        if [[ $(apt-cache policy "$package") != *Candidate:\ [0-9]* ]]; then
            apt-get -qq update
            break
        fi
    done
    # Lists that are older than the mirror name files that are gone; then one update heals.
    apt_get_install "$@" || { apt-get -qq update && apt_get_install "$@"; }
}

apt_get_install() { apt-get -qq -o Dpkg::Use-Pty=0 install --no-install-recommends --yes "$@" </dev/null >/dev/null; }

# unpacked NAME SUITE:PACKAGE…: prints a directory of the cache with these packages unpacked, not installed.
unpacked() {
    local name=$1
    shift
    cached "$name-$(key "$@")" unpack "$@"
}

unpack() {
    local directory=${!#} suite package
    local archives=$directory/archives
    mkdir "$archives"
    for package in "${@:1:$#-1}"; do
        suite=${package%%:*}
        under_lock "apt-$suite" download "$suite" "${package#*:}" "$archives"
    done
    for package in "$archives"/*.deb; do
        # shellcheck disable=SC2016  # dpkg's own placeholders
        dpkg-deb --show --showformat 'unpacked ${Package} ${Version}\n' "$package" | tee -a "$directory/versions" >&2
        dpkg-deb --extract "$package" "$directory"
    done
    rm -r "$archives"
}

download() {
    local suite=$1 package=$2 into=$3
    local -x APT_CONFIG=$cache_directory/apt-$suite/apt.conf
    [[ -e $APT_CONFIG ]] || configure_apt "$suite"
    # Old lists may name a file that the mirror has replaced; then one update heals.
    (cd "$into" && { apt-get -qq download "$package" || { apt-get -qq update && apt-get -qq download "$package"; }; })
}

configure_apt() {
    local suite=$1 directory=$cache_directory/apt-$1 mirror keyring
    read -r mirror keyring < <(machine_mirror)
    mkdir -p "$directory"/{lists,cache/archives}/partial
    : >"$directory/status"
    # A keyring of this release signs its successors too.
    printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$mirror" "$suite" >"$directory/sources.list"
    cat >"$directory/new.conf" <<-END
	Dir::Etc::SourceList "$directory/sources.list";
	Dir::Etc::SourceParts "/dev/null";
	Dir::State::Lists "$directory/lists";
	Dir::State::Status "$directory/status";
	Dir::Cache "$directory/cache";
	APT::Sandbox::User "root";
	Acquire::Languages "none";
	END
    APT_CONFIG=$directory/new.conf apt-get -qq update
    mv "$directory/new.conf" "$directory/apt.conf"
}

# Prints the address and the keyring of the mirror from which this machine takes Debian's main archive.
machine_mirror() {
    local codename
    codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    # shellcheck disable=SC2016  # apt's own placeholders
    APT_CONFIG='' apt-get indextargets --format '$(CREATED_BY) $(COMPONENT) $(RELEASE) $(REPO_URI) $(SIGNED_BY)' |
        awk -v codename="$codename" '
            $1 == "Packages" && $2 == "main" && $3 == codename {
                print $4, ($5 ~ /^\// ? $5 : "/usr/share/keyrings/debian-archive-keyring.gpg")
                found = 1
                exit
            }
            END { if (!found) { print "no apt source for Debian " codename " main on this machine" > "/dev/stderr"; exit 1 } }'
}
