import platform

from hypothesis import Phase, settings

ON_LINUX_X86 = (platform.system(), platform.machine()) == ("Linux", "x86_64")
INTERPRETED = settings(deadline=None, phases=[Phase.generate])  # shrinking takes minutes
