"""The commands of `dsr1kit`, by what they are for; cli.py runs them."""
