from grounded_sam.cli.main import main

main()
