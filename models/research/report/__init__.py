"""REPORT.md: claims, the verdicts on them, and the tables and plots of all studies."""
