"""What every export is asked, by whom, and how its answers are compared with ours."""
