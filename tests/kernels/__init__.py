"""Tests of the Triton kernels, without a GPU."""

import platform

ON_LINUX_X86 = (platform.system(), platform.machine()) == ("Linux", "x86_64")
