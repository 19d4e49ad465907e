"""`python -m learn <command>`."""

from learn.cli import main

raise SystemExit(main())
