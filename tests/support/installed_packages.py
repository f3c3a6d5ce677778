"""accelerate's look-ups of installed packages, remembered: several times in each training step it parses the metadata of one."""

import sys
from functools import cache


def remember_packages() -> None:
    imports = sys.modules.get("accelerate.utils.imports")
    if imports is not None and not hasattr(imports._is_package_available, "cache_info"):
        imports._is_package_available = cache(imports._is_package_available)
