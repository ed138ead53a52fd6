"""`python -m aapt_deploy` is `aapt`."""

from aapt_deploy.cli import main

main()
