import ChatCore
import EdgeStreamKit
import Foundation

/// Loads a model and opens its session: the saved one, or a new one with the largest cache that fits into memory.
@MainActor
struct SessionLoader {
    /// One session file per model.
    private let folder: URL
    private let system: any ChatSystem

    init(folder: URL, system: any ChatSystem) throws {
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        (self.folder, self.system) = (folder, system)
    }

    func file(of entry: ModelStore.Entry) -> URL {
        folder.appendingPathComponent(entry.id + ".session")
    }

    /// What was said, for recall: it goes with the session.
    func log(of entry: ModelStore.Entry) -> URL {
        file(of: entry).appendingPathExtension("log")
    }

    func remove(sessionOf entry: ModelStore.Entry) throws {
        for file in [file(of: entry), log(of: entry)] where FileManager.default.fileExists(atPath: file.path) {
            try FileManager.default.removeItem(at: file)
        }
    }

    /// The session, and what the user should know about it. `options`: what the manifest does not set.
    func load(
        _ entry: ModelStore.Entry, options: SessionOptions, budget: MemoryBudget, onProgress: @escaping ProgressHandler
    ) async throws -> (session: Session, notice: ChatState.Notice?) {
        let file = file(of: entry)
        var (saved, lost) = try await savedSession(file)
        let (options, smaller) = try await fittingOptions(entry, saved, options, budget)
        let model = try await Model.load(entry.file, onProgress: onProgress)
        if let found = saved, !found.belongs(to: model.info) {
            lost = try setAside(file)
            saved = nil
        }
        let session =
            saved == nil
            ? try await Session.open(model, options: options)
            : try await Session.restore(model, from: file, options: options)
        return (session, lost ?? smaller)
    }

    private func savedSession(_ file: URL) async throws -> (SavedSession?, ChatState.Notice?) {
        guard FileManager.default.fileExists(atPath: file.path) else { return (nil, nil) }
        do {
            return (try await Session.peek(file), nil)
        } catch let error where [.format, .version].contains(error.code) {
            return (nil, try setAside(file))
        }
    }

    /// A session that cannot be restored is not ours to delete, nor are those set aside before it.
    private func setAside(_ file: URL) throws -> ChatState.Notice {
        let names = sequence(first: 1) { $0 + 1 }.lazy.map { file.appendingPathExtension($0 == 1 ? "old" : "old\($0)") }
        let other = names.first { !FileManager.default.fileExists(atPath: $0.path) }!
        try FileManager.default.moveItem(at: file, to: other)
        return .sessionLost(other.lastPathComponent)
    }

    /// The manifest's options, with a smaller cache and a notice if need be. Throws if none fits.
    private func fittingOptions(
        _ entry: ModelStore.Entry, _ saved: SavedSession?, _ given: SessionOptions, _ budget: MemoryBudget
    ) async throws -> (SessionOptions, ChatState.Notice?) {
        var options = given
        options.contextSize = saved?.contextSize ?? entry.manifest.contextSize  // a saved session keeps its size
        options.sinks = entry.manifest.sinks ?? 4
        options.keyType = try cacheType(entry.manifest.keyType)
        options.valueType = try cacheType(entry.manifest.valueType)
        options.chatTemplate = entry.manifest.chatTemplate
        let wanted = try await Model.memoryNeed(of: entry.file, session: options)
        guard case .refused(let short) = budget.judge(need: wanted.peak, available: system.availableMemory) else {
            return (options, nil)
        }
        for size in sequence(first: wanted.contextSize / 2, next: { $0 / 2 }).prefix(while: { saved == nil && $0 >= 1024 }) {
            options.contextSize = size
            let need = try await Model.memoryNeed(of: entry.file, session: options).peak
            if budget.judge(need: need, available: system.availableMemory) == .fits {
                return (options, .smallerCache(size))
            }
        }
        let need = ByteCountFormatter.string(fromByteCount: Int64(clamping: wanted.peak), countStyle: .memory)
        let missing = ByteCountFormatter.string(fromByteCount: Int64(clamping: short), countStyle: .memory)
        throw EdgeStreamError(.memory, "The model needs \(need) of memory: \(missing) more than there is.")
    }

    private func cacheType(_ name: String?) throws -> CacheType {
        guard let name else { return .f16 }
        guard let type = CacheType(rawValue: name) else {
            throw EdgeStreamError(.invalid, "the manifest asks for the cache type \(name), which is unknown")
        }
        return type
    }
}
