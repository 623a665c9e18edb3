from grounded_sam.cli import main

main()
