"""Options: their tables, the command line, the presets' starting point, the checks at parse."""
