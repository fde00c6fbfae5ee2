"""The command line: a file for each command, `add` its flags and `run` it.

Flags and config files stop here; a command receives a checked `Config`.
"""
