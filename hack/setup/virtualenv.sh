# Two virtual environments: one with all dependencies, shared by every checkout, and a thin one for each checkout, which
# sees the first and has the project itself, installed editable, and so its entry points.
# shellcheck shell=bash disable=SC2154  # checkout is set in all.sh, cache_directory in cache.sh

airflow_version=3.3.2
constraints=$checkout/constraints/airflow-$airflow_version.txt
providers=(standard celery edge3 docker git)

# virtualenv_directory: prints the thin environment of this checkout; bin/ has airflow, pytest, mypy, ruff.
virtualenv_directory() {
    local dependencies
    dependencies=$(dependencies_directory)
    made_in_place "virtualenv-$(key "$checkout" "$dependencies" "$(<"$checkout/pyproject.toml")" "$(declare -f make_virtualenv)")" \
        make_virtualenv "$dependencies"
}

make_virtualenv() {
    local dependencies=$1 directory=$2 script
    "$dependencies/bin/python" -m venv --without-pip "$directory"
    printf 'import site; site.addsitedir("%s")\n' "$(site_packages "$dependencies")" \
        >"$(site_packages "$directory")/dependencies.pth"
    # Scripts of the dependencies, run by the interpreter that also sees the project.
    for script in "$dependencies"/bin/*; do
        [[ ! -e $directory/bin/${script##*/} ]] || continue
        if [[ $(head --bytes 2 "$script" | tr '\0' ' ') == '#!' ]]; then
            sed "1s|$dependencies/bin/|$directory/bin/|" "$script" >"$directory/bin/${script##*/}"
            chmod +x "$directory/bin/${script##*/}"
        else
            ln -s "$script" "$directory/bin/"
        fi
    done
    "$directory/bin/python" -m pip install --quiet --quiet --no-deps --no-build-isolation --editable "$checkout"
}

# dependencies_directory: prints the environment with Airflow, its providers and the tools, but without the project.
dependencies_directory() {
    local python
    python=$(suitable_python)
    made_in_place "dependencies-$(key "$python" "$("$python" -VV)" "$(<"$constraints")" "${providers[*]}" "$(declared)")" \
        make_dependencies "$python"
}

make_dependencies() {
    local python=$1 directory=$2
    say "Installing Airflow $airflow_version and the tools with $("$python" --version)…"
    "$python" -m venv "$directory"
    local pip=("$directory/bin/python" -m pip --disable-pip-version-check install --quiet --quiet --constraint "$constraints")
    "${pip[@]}" --upgrade pip
    "${pip[@]}" "apache-airflow==$airflow_version" "${providers[@]/#/apache-airflow-providers-}" hatchling editables
    "$directory/bin/python" - "$checkout/pyproject.toml" >"$directory/requirements.txt" <<-'END'
	import sys
	try:
	    import tomllib
	except ModuleNotFoundError:  # Python 3.10
	    from pip._vendor import tomli as tomllib
	with open(sys.argv[1], "rb") as file:
	    document = tomllib.load(file)
	project = document["project"]
	print(*project["dependencies"], *project["optional-dependencies"]["docker"], sep="\n")
	print(*document["dependency-groups"]["dev"], sep="\n")
	END
    "${pip[@]}" --requirement "$directory/requirements.txt"
}

# pip_directory: prints the directory that holds the package pip.
pip_directory() { site_packages "$(dependencies_directory)"; }

site_packages() { printf '%s\n' "$1"/lib/python3*/site-packages; }

# What pyproject.toml asks for, without its lint settings and the like.
declared() {
    sed -n '/^dependencies = \[/,/^\]/p; /^\[project.optional-dependencies\]/,/^$/p; /^\[dependency-groups\]/,/^$/p' \
        "$checkout/pyproject.toml"
}

# Prints a Python 3.10 to 3.13 that can make virtual environments; Debian's own is completed when there is none.
suitable_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3.10 python3; do
        if suits "$name"; then return; fi
    done
    need_package python3 python3-venv
    suits /usr/bin/python3 || fail "Debian's python3 is not one of 3.10 to 3.13; put one of them on PATH"
}

# The file behind all links: whatever name or virtual environment leads to it, it is the same interpreter.
suits() {
    "$1" -c 'if True:
        import os, sys, venv, ensurepip
        assert (3, 10) <= sys.version_info[:2] <= (3, 13)
        print(os.path.realpath(sys.executable))' 2>/dev/null
}

# made_in_place NAME COMMAND…: as cached, for what can't be renamed: the directory counts when it holds `complete`.
made_in_place() {
    local name=$1
    shift
    [[ -e $cache_directory/$name/complete ]] || under_lock "$name" fill_in_place "$cache_directory/$name" "$@" >&2
    printf '%s\n' "$cache_directory/$name"
}

fill_in_place() {
    local directory=$1
    shift
    [[ ! -e $directory/complete ]] || return 0
    rm -rf "$directory"
    "$@" "$directory"
    touch "$directory/complete"
}
