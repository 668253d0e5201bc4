"""Say where the packages are: the folders passes/ and backends/ are installed inside the package memcompile.

Everything else about the distribution is in pyproject.toml. The list is made from the folders, so that a new
subpackage is never forgotten; from the real folders rather than the links memcompile/passes and
memcompile/backends, so that nothing is packed twice and an sdist, having no links, builds the same wheel.
"""

from __future__ import annotations

from setuptools import find_packages, setup

OUTSIDE = {"memcompile.passes": "passes", "memcompile.backends": "backends"}


def packages() -> list[str]:
    """The dotted names of all packages of the wheel."""
    links = [pattern for name in OUTSIDE for pattern in (name, f"{name}.*")]
    names = find_packages(include=["memcompile", "memcompile.*"], exclude=links)
    for name, folder in OUTSIDE.items():
        names += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]
    return names


setup(packages=packages(), package_dir={"memcompile": "memcompile", **OUTSIDE})
