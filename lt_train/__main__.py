from lt_train.cli import main

main()
