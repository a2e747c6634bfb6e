"""Hosted against local: tasks, runs, statistics, report."""
