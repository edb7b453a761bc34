"""`python -m launch.report`."""

from launch.failures import run_program
from launch.report.command import main

run_program(main)
