from hypothesis import settings

# The first example compiles kernels, and shared machines stall: time limits say nothing here.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
