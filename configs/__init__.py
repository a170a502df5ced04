"""What a run is: the typed schema, the recipes, and the command line made of them."""

import os

# read when torch is imported: a connection lost to another rank is said in one line, not with a stack of C++ as well
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
