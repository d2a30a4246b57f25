from hypothesis import settings

# A first example compiles kernels, and shared machines stall: no time limits.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
