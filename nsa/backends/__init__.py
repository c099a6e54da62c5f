"""The branches of NSA through libraries, one file a library, all with the signatures of ``nsa.reference``."""
