static void test_planted_bugs() {}
