"""Where jobs run when they do not run in this process. An executor knows no stage and no algorithm."""
