"""Tables, live view and figures, made from stored rows and files alone; imports neither torch nor nsa."""

import logging

# Where its cache folder is not writable, matplotlib would say so on stderr as it is imported.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
