"""Training of the bundled models: `python -m kvjax.train --help`."""
