# What only benchmarks need: Python packages beside the virtual environment, and a PostgreSQL that is not installed.
# shellcheck shell=bash disable=SC2154  # constraints is set in virtualenv.sh

plotting=(matplotlib==3.10.8)
postgresql_drivers=(psycopg2-binary==2.9.13 asyncpg==0.31.0)

# plotting_directory, postgresql_drivers_directory: print a directory for PYTHONPATH.
plotting_directory() { packages_directory "${plotting[@]}"; }
postgresql_drivers_directory() { packages_directory "${postgresql_drivers[@]}"; }

packages_directory() {
    local dependencies
    dependencies=$(dependencies_directory)
    cached "packages-$(key "$dependencies" "$(<"$constraints")" "$@")" install_packages_beside "$dependencies" "$@"
}

install_packages_beside() {
    local dependencies=$1 directory=${!#}
    say "Installing ${*:2:$#-2}…"
    "$dependencies/bin/python" -m pip --disable-pip-version-check install --quiet --quiet --constraint "$constraints" \
        --target "$directory" "${@:2:$#-2}"
}

# postgresql_directory: prints the directory into which PostgreSQL 15 is unpacked.
postgresql_directory() {
    need_package libicu72 libldap-2.5-0 liblz4-1 libpam0g libssl3 libsystemd0 libxml2 libzstd1
    unpacked postgresql bookworm:postgresql-15 bookworm:postgresql-client-15 bookworm:libpq5
}
