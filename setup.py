"""The packages of the wheel: the library, and below it the recipe's programs and configs (`distmuon/cli/recipe.py`).

Everything else is in setup.cfg. The recipe's folders keep their places in a clone, and lie in `distmuon/_recipe` in an
installed package, so that nobody's site-packages get a package called `launch`.
"""

from setuptools import find_packages, setup

programs = find_packages(include=["launch", "launch.*"])
configs = ["configs", "configs.deepspeed", "configs.experiments"]
setup(
    packages=[
        *find_packages(include=["distmuon", "distmuon.*"]),
        *(f"distmuon._recipe.{name}" for name in programs + configs),
    ],
    package_dir={"distmuon._recipe": "."},
)
