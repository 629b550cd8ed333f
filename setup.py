"""Names the packages: those under adms/, and adms.patches, whose files are in patches/."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["adms", "adms.*"]), "adms.patches"])
