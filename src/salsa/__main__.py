"""`salsa` and `python -m salsa`: signals are handled before anything slow is imported."""

from salsa.stopping import listen, stopped


def main() -> None:
    """Run the command line; a signal ends it with one line, however early it comes."""
    try:
        listen()
        from salsa.cli import main as run

        run()
    except KeyboardInterrupt:
        stopped()


if __name__ == "__main__":
    main()
