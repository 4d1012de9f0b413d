export * from "./backend-server.js";
