// The slash commands: [name, range of its value, what it does].

const COMMANDS = [
  ["/temperature", "0 to 2", "show or set how freely it draws its words"],
  ["/topk", "0 to 200", "show or set among how many tokens it draws, 0 is all"],
  ["/length", "1 to 4096", "show or set the most tokens of a reply"],
  ["/clear", "", "new conversation, as Ctrl+Shift+O"],
  ["/help", "", "all commands and keys"],
];
const KEYS = `
Enter sends, Shift+Enter starts a new line, Tab completes a command,
Escape stops a reply or an edit, Up in the empty box edits your last message,
/ goes to the box.`;

// Those that what is typed may become.
export const fittingCommands = (typed) =>
  (/^\/[a-z]*$/i.test(typed) ? COMMANDS.filter(([name]) => name.startsWith(typed.toLowerCase())) : []);

export function help() {
  const lines = COMMANDS.map(([name, range, what]) => `${name} ${range && `[${range}]`}`.padEnd(25) + what);
  return [...lines, KEYS].join("\n");
}
