import ChatCore
import Foundation
import Testing

/// The checksum here is a stand-in: the store asks for one, and does not care how it is made.
@Sendable private func digest(_ url: URL) async throws -> String {
    let data = try Data(contentsOf: url)
    let sum = stride(from: 0, to: data.count, by: 4096).reduce(UInt64(data.count)) { $0 &* 31 &+ UInt64(data[$1]) }
    return String(repeating: "0", count: 48) + String(sum + 0x1000_0000_0000_0000, radix: 16).suffix(16)
}

@Suite final class ModelStoreTests {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent("store-\(UUID().uuidString)")
    let model: URL
    let content = Data("GGUF".utf8) + Data(repeating: 7, count: 9_000_000)

    init() throws {
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        model = folder.appendingPathComponent("tiny.gguf")
        try content.write(to: model)
    }

    deinit {
        try? FileManager.default.removeItem(at: folder)
    }

    private func store() throws -> ModelStore {
        try ModelStore(folder: folder.appendingPathComponent("models"), digest: digest)
    }

    /// A folder as export-ios writes it.
    private func exported(_ change: (inout [String: Any]) -> Void = { _ in }) async throws -> URL {
        let export = folder.appendingPathComponent("export-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: export, withIntermediateDirectories: true)
        try content.write(to: export.appendingPathComponent("model.gguf"))
        var manifest: [String: Any] = [
            "format": 1, "name": "Tiny one", "file": "model.gguf", "bytes": content.count,
            "sha256": try await digest(model), "n_ctx": 2048, "n_keep": 4, "cache_type_k": "q8_0",
            "cache_type_v": "q8_0", "device": "iPhone 15", "something": "else",
        ]
        change(&manifest)
        try JSONSerialization.data(withJSONObject: manifest).write(to: export.appendingPathComponent("manifest.json"))
        return export
    }

    private func leftovers() throws -> [String] {
        try FileManager.default.contentsOfDirectory(atPath: folder.appendingPathComponent("models").path)
    }

    @Test func aFileIsImported() async throws {
        let store = try store()
        let entry = try await store.add(model)
        #expect(try Data(contentsOf: entry.file) == content)
        #expect(entry.manifest.name == "tiny" && entry.manifest.contextSize == nil)
        #expect(entry.manifest.sha256 == (try await digest(model)))
        #expect(try self.store().entries() == [entry])
        #expect(FileManager.default.fileExists(atPath: model.path))
        await #expect(throws: ModelStoreError.exists("tiny")) { try await store.add(self.model) }
        try store.remove(entry)
        #expect(try store.entries().isEmpty && leftovers().isEmpty)
    }

    @Test func anExportedFolderIsImported() async throws {
        let entry = try await store().add(exported())
        #expect(entry.manifest.contextSize == 2048 && entry.manifest.keyType == "q8_0" && entry.id == "Tiny-one")
        #expect(entry.manifest.device == "iPhone 15")
    }

    @Test func whatIsWrongIsRefusedAndLeavesNothing() async throws {
        let store = try store()
        func refusal(_ url: URL, expected: ModelManifest? = nil) async -> ModelStoreError? {
            do {
                _ = try await store.add(url, expected: expected)
                return nil
            } catch {
                return error as? ModelStoreError
            }
        }
        let wrong = String(repeating: "a", count: 64)
        #expect(await refusal(try exported { $0["sha256"] = wrong }) == .wrongChecksum)
        #expect(
            await refusal(try exported { $0["bytes"] = 5 }) == .wrongSize(expected: 5, got: Int64(content.count)))
        #expect(await refusal(try exported { $0["format"] = 2 }) == .newerFormat(2))
        for bad in ["../../model.gguf", "", ".hidden", "a/b"] {
            #expect(await refusal(try exported { $0["file"] = bad }) == .noManifest("manifest.json"))
        }
        #expect(await refusal(try exported { $0["n_ctx"] = -1 }) == .noManifest("manifest.json"))
        #expect(await refusal(try exported { $0["sha256"] = "short" }) == .noManifest("manifest.json"))
        #expect(await refusal(try exported { $0["file"] = "missing.gguf" }) == .unreadable("missing.gguf"))
        #expect(await refusal(folder) == .unreadable("manifest.json"))
        #expect(await refusal(folder.appendingPathComponent("nothing")) == .unreadable("nothing"))
        let text = folder.appendingPathComponent("text.gguf")
        try Data("no model".utf8).write(to: text)
        #expect(await refusal(text) == .notAModel("text.gguf"))
        let expected = ModelManifest(name: "x", file: "x.gguf", bytes: Int64(content.count), sha256: wrong)
        #expect(await refusal(model, expected: expected) == .wrongChecksum)
        #expect(try store.entries().isEmpty && leftovers().isEmpty)
    }

    @Test func aCancelledImportLeavesNothing() async throws {
        let store = try store()
        let task = Task { [model] in
            try await store.add(model) { _ in withUnsafeCurrentTask { $0?.cancel() } }
        }
        await #expect(throws: CancellationError.self) { try await task.value }
        #expect(try leftovers().isEmpty)
    }

    @Test func whatAKilledImportLeftGoes() throws {
        let store = try store()
        let partial = store.folder.appendingPathComponent(".import-1")
        try FileManager.default.createDirectory(at: partial, withIntermediateDirectories: true)
        try Data("half".utf8).write(to: partial.appendingPathComponent("model.gguf"))
        #expect(try self.store().entries().isEmpty)
        #expect(try leftovers().isEmpty)
    }

    @Test func hubRepositories() throws {
        #expect(HubRepository.suggested.allSatisfy { HubRepository($0)?.name == $0 })
        #expect(HubRepository("user/repo-1.5_b")?.name == "user/repo-1.5_b")
        #expect(HubRepository(" hf:user/repo\n")?.name == "user/repo")
        #expect(HubRepository("https://huggingface.co/user/repo")?.name == "user/repo")
        for bad in ["", "repo", "user/", "/repo", "user/repo/more", "user/..", "us er/repo", "user/repo?x=1", "üser/repo"] {
            #expect(HubRepository(bad) == nil, "\(bad)")
        }
        let sum = String(repeating: "b", count: 64)
        let answer = """
            [{"type": "file", "path": "README.md", "size": 9},
             {"type": "file", "path": "big Q8.gguf", "size": 20, "lfs": {"oid": "\(sum)", "size": 20, "pointerSize": 1}},
             {"type": "file", "path": "sub/small.gguf", "size": 10, "lfs": {"oid": "\(sum)", "size": 10}},
             {"type": "file", "path": "mmproj-x.gguf", "size": 5, "lfs": {"oid": "\(sum)", "size": 5}},
             {"type": "file", "path": "x-00001-of-00002.gguf", "size": 5, "lfs": {"oid": "\(sum)", "size": 5}},
             {"type": "directory", "path": "sub"}]
            """
        let files = try #require(HubRepository("user/repo")).files(in: Data(answer.utf8))
        #expect(files.map(\.path) == ["sub/small.gguf", "big Q8.gguf"])
        #expect(files[1].address.absoluteString == "https://huggingface.co/user/repo/resolve/main/big%20Q8.gguf")
        #expect(files[0].manifest == ModelManifest(name: "small", file: "small.gguf", bytes: 10, sha256: sum))
        #expect(throws: (any Error).self) { try HubRepository("user/repo")!.files(in: Data("no".utf8)) }
    }
}
