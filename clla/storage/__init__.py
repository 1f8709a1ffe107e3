"""Files and directories: digests, atomic writing, paths and locks."""
