"""`python -m scripts.demo`, which is what scripts/quickstart runs."""

from .pipeline import main

if __name__ == "__main__":
    main()
