"""`python lightning_cli.py fit --config configs/experiment/quickstart.yaml`"""

from mf_lightning.cli import main

if __name__ == "__main__":
    main()
